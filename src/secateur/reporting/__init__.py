"""What a run did: its figures as plain data, and as a page for people.

A page is one HTML file without scripts: jinja2 fills the template, and matplotlib draws the charts as SVG. Everything
that comes from a model or a file is escaped, and the page's own policy forbids scripts and the network.
"""
