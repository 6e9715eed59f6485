"""Studies of many runs: questions, arms, runs, records, statistics and pages."""
