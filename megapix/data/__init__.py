"""From positions of a run to micro batches: which sample comes when, reading it, decoding it, handing it over.

Stage by stage, in worker processes (or, with workers = 0, in the training process):

    order.micro_batches    positions of this rank's next micro batches, from the run's position on
    order.Order            position -> sample number, by the epoch's permutation
    read.ShardReader       sample number -> encoded image and label: one read per sample, its CRC checked; below a URL
                           ranges that are asked for ahead, or whole shards that `cache` keeps on a local disk
    read.Decoder           -> uint8 image [3, H, W]; another sample's, by (seed, position), if this one is damaged
    flip                   mirrored where (seed, position) says so
    FeatureReader          sample number, mirrored or not -> REPA's features, where they were computed before
    captions.choose        a caption of the sample, by (seed, position), or its features (TextFeatureReader)
    assemble.Assembler     positions -> `arrays.Arrays`, all of the above, in workers without torch
    workers.Workers        processes that do so in turn and hand over (`handover`) what they have made, in order
    loader.batches         the endless micro batches of a rank, in tensors: `batch.Batch`

Before the first of them `locate` finds the index, makes a local copy of a remote one, and checks it against its files.

Resume contract: what stands at a position depends on seed, options and data alone, and the state of it all is one
integer, the position of the next step. `batches(…, position=p)` yields exactly what a loader started at 0 yields after
p positions, for any number of ranks and workers and any micro batch. Example: with a global batch of 8, two ranks and
micro batches of 2, a run that stopped after 5 steps resumes with

    rank 0: batches(…, rank=0, position=40)     positions [40 41], [42 43], then [48 49], …
    rank 1: batches(…, rank=1, position=40)     positions [44 45], [46 47], then [52 53], …

and on one rank with micro batches of 4 the same images come as [40 41 42 43], [44 45 46 47], [48 49 50 51], ….
"""
