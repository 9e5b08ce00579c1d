"""The page that a run ends in: one HTML file that needs nothing else, with figures as SVG."""
