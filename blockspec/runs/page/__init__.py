"""``blockspec report``: a run as one page of HTML, to be explored and sent."""
