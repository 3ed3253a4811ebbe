"""Sessions that have work now, the acceptance and the deletion of this work, and its drain."""
