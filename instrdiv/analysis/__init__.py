"""What tables say: thresholds, claims, pictures, and the diversity of a data set; pure functions of rows."""
