"""What the commands share: their flags and bars, reports, plots and statistics."""
