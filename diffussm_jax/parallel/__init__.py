"""The device mesh, sharding, machines, and collectives of compiled programs."""
