"""What the command line does with a profile's server, and how it shows it."""
