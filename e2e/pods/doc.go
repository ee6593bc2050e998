// Package pods tests the images: it builds them and runs them as containers of real pods beside a real workload. podman and
// runc take the place of a kubelet and its runtime. The package has tests only.
//
// All pods run on one node: a network namespace of the test, in which podman has its own mounts and processes. The pods,
// images, networks and settings vanish with it.
package pods
