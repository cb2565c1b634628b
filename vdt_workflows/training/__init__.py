"""What a training needs around MONAI's trainer."""
