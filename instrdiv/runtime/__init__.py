"""What any long-running job needs, independent of model and task."""
