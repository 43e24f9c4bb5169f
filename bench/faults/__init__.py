"""The kinds of trials of bench/campaign.py, and what they share."""
