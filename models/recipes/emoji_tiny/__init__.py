"""The recipe that trains `emoji-tiny`, a text-to-image model of under 30 MB that paints 64x64 emoji from their names.

Run it with ``python -m models.recipes.emoji_tiny.train --work DIR``; every stage resumes where it stopped.
"""
