// Package pods holds the images to their promises: they are built, and run as containers of real pods beside a real
// workload, by podman and runc, which do what a kubelet and its runtime do. It holds tests only.
//
// All pods live on one node: a network namespace of the test, in which podman has its own mounts and processes. They
// vanish with it, and so do its images, networks and settings.
package pods
