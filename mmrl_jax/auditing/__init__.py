"""Finds bad samples in demonstrations and in image-text data.

    directory -> reading.read             -> `samples.Episodes` or `samples.ImageTexts`, in memory
              -> checks.run               -> `checks.Report`: scores and flags of each check
              -> checks.write             -> audit.json and a file of weights for each split
              -> reporting.audit_page     -> audit.html

A check is a pure function from samples to scores, and a row of `checks.IMAGE_TEXT` or
`checks.DEMONSTRATIONS` with its threshold. Models that score samples are small, and are fitted by
numpy out of fold: a sample is never scored by a model that was fitted to it.
"""
