"""What is asked: the seam that every task shows (task.py), and the tasks."""
