"""What people look at: the page of a run, the comparison, the live server, the report. Reads outputs/ only, never torch."""
