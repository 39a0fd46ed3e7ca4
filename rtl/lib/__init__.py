"""Components that every target shares."""
