"""Many replicas on Ray: an offline batch on Ray Data and a deployment on Ray Serve."""
