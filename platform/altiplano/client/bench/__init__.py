"""A load generator: open-loop arrivals, one stream per request, vLLM's names for what is measured.

Data moves one way: data set and arrivals → load → records → metrics → result file and report.
"""
