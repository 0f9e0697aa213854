"""The HTML report of finished runs: python -m llava.eval.report RUN... [-o report.html]"""
