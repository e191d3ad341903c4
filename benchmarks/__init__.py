"""Side by side benchmarks of dramatiq-jetstream, its peers and its bounds."""
