"""`tenfold study`: the doctrine's claims, measured.

config      study.yaml and the presets                 run         lr-ratio, rank, layers, batch: drives the arms
arms        what is compared, each with its grid       capacity_run, compute_run   the two with recipes of their own
agenda      which points are still to run              common      what all drivers share
work        those points, for Ray Tune                 frame, results   results.json
comparison  arms beside each other                     report, charts, curves, axes, canvas, csv_table   the page
figures     figures and their series as data
findings    protocol, limits and the conclusion of a kind (lr_ratio, rank, layers, batch)
capacity, capacity_findings   facts of known bits      compute, compute_costs, compute_findings, compute_pictures
"""
