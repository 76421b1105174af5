"""Demonstrations on the host: records, the formats in which people keep them, and batches of them.

    directory -> formats.open_directory -> episodes of the source
              -> mapping.FeatureMapping -> `records.Episode` in our names and sizes
              -> packed.pack            -> memory-mapped arrays on the local disk, made once
              -> pipeline.Pipeline      -> the batch of an update

Episodes that cannot be used are set aside with a reason and counted, see `records.Quarantine`. This
package uses numpy alone; packages that only one format needs are imported where it is read.
"""
