"""Studies of many runs: what is asked, the runs that answer it, and what they say."""
