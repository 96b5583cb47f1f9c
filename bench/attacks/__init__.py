"""What hostile clients, files and templates do, for `bench.attack`."""
