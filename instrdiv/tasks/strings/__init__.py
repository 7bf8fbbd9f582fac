"""String rewriting: letters, rules, examples, suites and mistakes, and the task they make."""
