"""Every number that the pages report, by question; README.md lists the commands."""
