package mesh

import (
	"fmt"
	"strings"
)

// Class is what a finding concerns.
type Class uint8

// The classes, from the least to the most important.
const (
	Cosmetic Class = iota // nothing that traffic depends on
	Traffic               // traffic goes otherwise than it was configured; the rest of the resource is honoured

	// Unenforced is a restriction that is understood and not carried out, or a way of forwarding that is not supported. What
	// it concerns is closed, so the resource can be used as it stands.
	Unenforced

	Security // the resource cannot be used as it stands, and what it concerns is closed
)

var classNames = [...]string{Cosmetic: "cosmetic", Traffic: "traffic", Unenforced: "unenforced", Security: "security"}

func (c Class) String() string { return classNames[c] }

// Finding is a part of a resource that is not honoured.
type Finding struct {
	Class   Class
	Path    string // of the field in the resource, such as "circuit_breakers.thresholds[0].retry_budget"
	Problem string
	Origin  string // resource of the configuration that this part stems from, as istiod names it; may be empty
}

// OriginText returns the finding's Origin as "virtual-service shop/web", or as istiod names it if that has another form.
func (f Finding) OriginText() string {
	parts := strings.Split(f.Origin, "/") // /apis/GROUP/VERSION/namespaces/NAMESPACE/KIND/NAME
	if len(parts) != 8 || parts[1] != "apis" || parts[4] != "namespaces" {
		return f.Origin
	}
	return parts[6] + " " + parts[5] + "/" + parts[7]
}

func (f Finding) String() string { return fmt.Sprintf("%s: %s", f.Path, f.Problem) }

// maxFindings bounds the findings that are kept of one resource.
const maxFindings = 100
