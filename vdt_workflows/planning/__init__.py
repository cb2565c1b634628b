"""Settings found from the data, and trainings that take them."""
