"""Tasks: the interface that every task implements (task.py), and the tasks themselves."""
