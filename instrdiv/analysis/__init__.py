"""Analysis of tables: thresholds, claims, plots, and the diversity of a data set; pure functions of rows."""
