"""How well a whole model still does its work: lines that it reads, pictures that it paints."""
