"""Finished runs as one HTML page that needs no network: python -m llava.eval.report RUN... [-o report.html]"""
