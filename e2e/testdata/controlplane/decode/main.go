// Command decode measures what the resources of a control plane cost: decoded by hand as in pillion, or by
// go-control-plane's generated types. It prints one figure on each line, with its name.
package main

import (
	"bytes"
	"flag"
	"fmt"
	"log"
	"log/slog"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/pillion-proxy/pillion/internal/controlplane"
	"github.com/pillion-proxy/pillion/internal/controlplane/pushtest"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/xds"
)

const rounds = 5

func main() {
	generated := flag.Bool("generated", false, "decode by generated types")
	flag.Parse()
	figure("start", resident())
	for _, push := range []struct {
		name string
		of   func() []xds.Update
	}{{"sidecar", pushtest.Sidecar}, {"thousand", pushtest.Thousand}} {
		updates := push.of()
		decode := byHand
		if *generated {
			decode = byGeneratedTypes
		}
		figure(push.name+" CPU ms", median(func() { decode(updates) }))
		updates = nil
		figure(push.name, resident())
	}
	if !*generated {
		full := median(func() { store(pushtest.Thousand()) })
		figure("one endpoint %", 100*oneEndpoint()/full)
	}
}

// median returns the median of the CPU time, in milliseconds.
func median(work func()) float64 {
	var all []time.Duration
	for range rounds {
		before := cpu()
		work()
		all = append(all, cpu()-before)
	}
	slices.Sort(all)
	return float64(all[rounds/2].Microseconds()) / 1e3
}

func figure(name string, value float64) { fmt.Printf("%s\t%g\n", name, value) }

// byHand decodes as pillion does: with one compiler for a push.
func byHand(updates []xds.Update) {
	var c mesh.Compiler
	for i := range updates {
		for _, r := range updates[i].Resources {
			if err := decodeResource(&c, updates[i].Type, r); err != nil {
				log.Fatalf("%v %s: %v", updates[i].Type, r.Name, err)
			}
		}
	}
}

func decodeResource(c *mesh.Compiler, t xds.Type, r xds.Resource) (err error) {
	c.Name(r.Name)
	switch b := r.Value; t {
	case xds.Clusters:
		_, _, err = c.Cluster(b)
	case xds.Endpoints:
		_, _, err = c.Assignment(b)
	case xds.Listeners:
		_, _, err = c.Listener(b)
	case xds.Routes:
		_, _, err = c.Routes(b)
	case xds.Secrets:
		_, _, err = mesh.DecodeSecret(b)
	case xds.Names:
		_, _, err = c.Names(b)
	}
	return err
}

func byGeneratedTypes(updates []xds.Update) {
	for i := range updates {
		for _, r := range updates[i].Resources {
			unpack(&anypb.Any{TypeUrl: r.TypeURL, Value: r.Value})
		}
	}
}

// store returns a store that has taken a push.
func store(updates []xds.Update) *controlplane.Store {
	s, err := controlplane.NewStore(controlplane.StoreConfig{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		log.Fatal(err)
	}
	for _, u := range updates {
		s.Update(u)
	}
	return s
}

// unpack decodes a message and all messages that are packed in it.
func unpack(packed *anypb.Any) {
	m, err := packed.UnmarshalNew()
	if err != nil {
		return // a type of Istio's that is not linked
	}
	unpackWithin(m.ProtoReflect())
}

func unpackWithin(m protoreflect.Message) {
	if packed, ok := m.Interface().(*anypb.Any); ok {
		unpack(packed)
		return
	}
	m.Range(func(field protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case field.Message() == nil:
		case field.IsMap():
			if field.MapValue().Message() != nil {
				v.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool { unpackWithin(v.Message()); return true })
			}
		case field.IsList():
			for i := range v.List().Len() {
				unpackWithin(v.List().Get(i).Message())
			}
		default:
			unpackWithin(v.Message())
		}
		return true
	})
}

// oneEndpoint returns the CPU time of a push that changes the endpoints of one of 1,000 services, in milliseconds.
func oneEndpoint() float64 {
	updates := pushtest.Thousand()
	s := store(updates)
	var versions []xds.Update // of one assignment, which differ in a service's number
	for _, u := range updates {
		for _, r := range u.Resources {
			if u.Type == xds.Endpoints && strings.Contains(r.Name, "9080||svc0500") {
				for n := range byte(10) {
					changed := r
					changed.Value = bytes.ReplaceAll(r.Value, []byte("192.0.2.2"), []byte{'1', '9', '2', '.', '0', '.', '2', '.', '0' + n})
					versions = append(versions, xds.Update{Type: u.Type, Resources: []xds.Resource{changed}})
				}
			}
		}
	}
	const changes = 500
	before := cpu()
	for i := range changes {
		s.Update(versions[i%len(versions)])
	}
	return float64((cpu() - before).Microseconds()) / 1e3 / changes
}

func cpu() time.Duration {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		log.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// resident returns the resident memory in MB, after what is not used was given back.
func resident() float64 {
	debug.FreeOSMemory()
	text, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		log.Fatal(err)
	}
	var size, pages int64
	if _, err := fmt.Sscan(string(text), &size, &pages); err != nil {
		log.Fatal(err)
	}
	return float64(pages*int64(os.Getpagesize())) / 1e6
}
