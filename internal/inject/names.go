package inject

import (
	"fmt"
	"strings"

	"github.com/pillion-proxy/pillion/internal/yamledit"
)

// names derives the workload's name from the object. A pod with a controller belongs to that controller. The names of a
// ReplicaSet, a Job and a ReplicationController contain the name of their owner, the workload.
func (o *found) names(p *pod, options Options) names {
	n := names{namespace: yamledit.Text(o.tree, "metadata", "namespace"), workload: yamledit.Text(o.tree, "metadata", "name")}
	if n.namespace == "" {
		n.namespace = options.Namespace
	}
	if n.namespace == "" {
		n.namespace = "default"
	}
	version, kind := yamledit.Text(o.tree, "apiVersion"), o.kind()
	if n.workload == "" {
		n.workload = strings.TrimRight(yamledit.Text(o.tree, "metadata", "generateName"), "-")
	}
	if owner := controller(o.tree); owner != nil {
		version, kind, n.workload = yamledit.Text(owner, "apiVersion"), yamledit.Text(owner, "kind"), yamledit.Text(owner, "name")
		label := func(name string) string { return yamledit.Text(p.tree, "metadata", "labels", name) }
		config := label("deploymentconfig")
		switch stem, end := cutLast(n.workload); {
		case kind == "ReplicaSet" && end != "" && end == label("rollouts-pod-template-hash"):
			version, kind, n.workload = "argoproj.io/v1alpha1", "Rollout", stem
		case kind == "ReplicaSet" && end != "" && end == label("pod-template-hash"):
			kind, n.workload = "Deployment", stem
		case kind == "ReplicationController" && config != "" && stem == config:
			version, kind, n.workload = "apps.openshift.io/v1", "DeploymentConfig", stem
		case kind == "Job" && len(end) >= 8 && strings.Trim(end, "0123456789") == "":
			kind, n.workload = "CronJob", stem
		}
	}
	if n.workload != "" && kind != "" {
		n.owner = fmt.Sprintf("kubernetes://apis/%s/namespaces/%s/%ss/%s", version, n.namespace, strings.ToLower(kind), n.workload)
	}
	return n
}

// controller returns the owner reference of an object's controller, or nil.
func controller(tree any) any {
	owners, _ := yamledit.Get(tree, "metadata", "ownerReferences").([]any)
	for _, owner := range owners {
		if yamledit.Get(owner, "controller") == true {
			return owner
		}
	}
	return nil
}

func cutLast(name string) (stem, end string) {
	if i := strings.LastIndexByte(name, '-'); i > 0 {
		return name[:i], name[i+1:]
	}
	return name, ""
}
