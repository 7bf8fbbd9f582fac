"""What a model is asked to do: strings, rules, rewriting, examples."""
