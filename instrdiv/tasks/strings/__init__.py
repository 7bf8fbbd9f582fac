"""String rewriting: letters, rules, examples, suites, mistakes, and the task built from them."""
