"""report.html: one page, self-contained, over all that the stages left in a work_dir."""
