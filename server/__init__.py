"""The coordinator: schedules stages, picks devices, aggregates updates and decides when a block has converged."""
