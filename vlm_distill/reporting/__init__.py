"""What people look at after a run: the HTML report, its plots, and samples as the models see them."""
