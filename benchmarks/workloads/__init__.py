"""What people run, through whole engines: long answers, agents that come back, bursts, steady traffic."""
