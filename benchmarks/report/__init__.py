"""Tables and pictures of README.md and docs/, made from the JSON in benchmarks/results/."""
