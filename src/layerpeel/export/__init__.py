"""Students on the hub and in the formats of other runtimes, and checks that what runs there is the same model."""
