"""What any long job needs; knows no model and no task."""
