"""Pure functions of exploration techniques, which know arrays and pytrees only."""
