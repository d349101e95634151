"""What a run shows for itself: its model card, its plots."""
