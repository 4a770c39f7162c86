"""Many runs at the command of one: sweeps, searches, launchers, and who gets which GPU."""
