"""Every number that the pages report, by question. README.md lists the commands."""

from benchmarks.common.missing import explain

explain()
