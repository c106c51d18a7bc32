"""fusestore: container storage as files.

How a byte comes from a layer's blob to read(2), and from write(2) to disk; each line imports only from those
below it (setup.cfg, checked by import-linter)::

    cli                     the commands; the only place that reads argv
    options                 what commands share: options and the environment
    daemon                  the background process of a mount
    mount                   one mount's life: start, serve, signals, unmount               trio
    watch                   what it says of itself: status, requests that take long
    mountpoint              what is in its way, what is there, how it is taken away
    terminal                how things are printed
    fuse                    pyfuse3's operations: decode, one call, encode; the errors     trio, pyfuse3
    tree                    what the mountpoint shows, by inode number
    imagetree               /images                    containertree    /containers
                                                       containerdir     one container's directory
                                                       documentfile     metadata.json as it is written
                                                       scratchfile      files beside it, in memory
    podmanview              /views/podman              ociview       /views/oci
                                                       ociindex      a new index.json there
                                                       stagedfile    files on their way in
    commit                  a container becomes an image         transfer    pull and push
    clone                   a container becomes another
    bundle                  a container for OCI runtimes
    reclaim                 what space is used for, and what can be given back
    hydration               layers uncompressed on disk: what that takes, made, given back
    export                  a container's tree, or its changes, as a tar
    changes                 what a container changed in its image
    drivers                 how a rootfs comes into the tree: union, erofs, overlay
    kernelrootfs            a rootfs that the kernel serves, mounted when somebody comes
    mounter                 the process that mounts for a daemon
    erofsmount              EROFS images mounted, by loop devices where need be
    writable                changes in a rootfs: copy-up, whiteouts, renames
    rootfs                  looking and reading in a rootfs
    openfile · objects      an open file there · its objects, those with a descriptor
    check                   verifies a store
    store                   images and containers on disk: the Python API
    importer                an image comes in, staged             storedir      a store made, and recognised
    downloads               blobs whose way here was cut off
    images                  index.json and what it reaches
    metadataimage           the EROFS image of a merged tree
    containers              directories, documents         layerfiles    opened layers, derived files
                                                           completion    lazy layers: all of it comes
                                                           lazylayer     read in parts from a registry
                                                           mounts        live mounts, and what they are told
    sources                 what an import reads                 registry    one repository of a registry
                                                                 transport   requests: TLS, rights, retries
                                                                 credentials, certificates: from podman's and
                                                                             docker's files
    sourcearchive           an archive's files                   reference   docker-like names
    sourcefiles             a directory's
    upper                   one container's diff/          blobs         a layer's bytes: ingest, LayerReader
    scheme                  what an upper's xattrs mean
    union                   layers + upper → names         spancache     what was decompressed, on disk
    streams, seek           compressed streams and the points where reading can start
    chunktable, layerref    a lazy layer's chunks; which content in which blob
    layer                   tar entries → a layer's index
    layerindex, tar, toc    the index file, read where touched; the tar scanner; eStargz, zstd:chunked
    erofs                   a tree → an EROFS image
    durable                 how a change reaches the disk: temporary, fsync, rename, fsync
    disk                    the system calls that change it
    lostmount               containers that a lost mount still serves
    metadata                the rules of metadata.json     oci           manifests and configs
                                                           imageconfig   what an image runs; commit
                                                           runtimespec   a config.json for runtimes
    tarwriter               the writer of tars         tarsplit      a tar as podman keeps it
    synthetic               made-up objects of the tree
    inodes                  nodes, lookup counts, handles
    meter, quota            requests counted and timed; what a container takes on disk
    names, acl, syscalls    names checked once; POSIX ACLs; system calls Python lacks
    walk                    all that is below a directory, however deep
    layout                  THE ON-DISK FORMAT
    nodes, errors           the vocabulary; every exception and its errno
"""
