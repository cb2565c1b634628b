"""A bundle as a zip that stands alone: made, checked, served."""
