package inject

import (
	"fmt"
	"strings"

	"github.com/pillion-proxy/pillion/internal/yamledit"
)

// names finds out what the pod will be called. A pod that a controller makes is its owner's, and a replica set's or a
// cron job's job are their owner's in turn, whose name is in theirs.
func (o *found) names(p *pod, options Options) names {
	n := names{namespace: yamledit.Text(o.tree, "metadata", "namespace"), workload: yamledit.Text(o.tree, "metadata", "name")}
	if n.namespace == "" {
		n.namespace = options.Namespace
	}
	if n.namespace == "" {
		n.namespace = "default"
	}
	version, kind := yamledit.Text(o.tree, "apiVersion"), o.kind
	if n.workload == "" {
		n.workload = strings.TrimRight(yamledit.Text(o.tree, "metadata", "generateName"), "-")
	}
	if owner := controller(o.tree); owner != nil {
		version, kind, n.workload = yamledit.Text(owner, "apiVersion"), yamledit.Text(owner, "kind"), yamledit.Text(owner, "name")
		hash := yamledit.Text(p.tree, "metadata", "labels", "pod-template-hash")
		switch stem, end := cutLast(n.workload); {
		case kind == "ReplicaSet" && hash != "" && end == hash:
			kind, n.workload = "Deployment", stem
		case kind == "Job" && len(end) >= 8 && strings.Trim(end, "0123456789") == "":
			kind, n.workload = "CronJob", stem
		}
	}
	if n.workload != "" && kind != "" {
		n.owner = fmt.Sprintf("kubernetes://apis/%s/namespaces/%s/%ss/%s", version, n.namespace, strings.ToLower(kind), n.workload)
	}
	return n
}

// controller is the owner that has made an object, or nil.
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
