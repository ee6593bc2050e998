package agent

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/pillion-proxy/pillion/gateway"
	"github.com/pillion-proxy/pillion/internal/balance"
	"github.com/pillion-proxy/pillion/internal/budget"
	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/dns"
	"github.com/pillion-proxy/pillion/internal/egress"
	"github.com/pillion-proxy/pillion/internal/localaddr"
	"github.com/pillion-proxy/pillion/internal/probe"
	"github.com/pillion-proxy/pillion/internal/serve"
	"github.com/pillion-proxy/pillion/internal/tcp"
)

// Agent carries a workload's traffic. Make it with New, and Run it once.
type Agent struct {
	config  Config
	log     *slog.Logger
	started time.Time
	telling telling

	poller        *tcp.Poller
	budget        *budget.Budget
	addresses     *localaddr.Set
	stopAddresses context.CancelFunc

	listeners []*trafficListener // in the order of shutdown; they start and are shown in reverse
	doors     sync.Mutex         // guards trafficListener.door

	plane       controlPlane
	balancer    *balance.Balancer  // of the clusters of the control plane; nil without one
	authorizer  *serve.Role        // asks servers about connections and requests
	accepting   *gateway.Listeners // of a gateway; nil otherwise
	unfollow    func()             // ends what a.accepting does; nil: it has not begun
	resolver    *dns.Server        // nil: DNS is not captured
	policy      *egress.Policy     // nil: the workload may reach everything
	stopPolicy  func()             // nil: no file is watched
	stopTending func()             // nil: it has not begun
	probers     *probe.Probers
	servers     []*server // in the order of shutdown
	serverLoops sync.WaitGroup

	orders
}

// New builds the parts and binds all ports, in the network namespace of the calling thread. Run starts to serve. When New
// fails, it closes everything that it opened. An error about one value of config is a FieldError.
func New(config Config) (*Agent, error) {
	if err := config.Validate(); err != nil {
		return nil, err
	}
	if err := mayBorrow(config.Interception.Mode, os.Geteuid()); err != nil {
		return nil, err
	}
	a := &Agent{config: config, log: config.Log, started: time.Now()}
	a.over, a.quitting = context.WithCancel(context.Background())
	if err := a.build(); err != nil {
		a.close()
		return nil, err
	}
	return a, nil
}

// mayBorrow refuses to run as the user whose connections TPROXY rules send to the agent. Its own connections to the
// workload have the client's address and would come back to it.
func mayBorrow(mode capture.Mode, user int) error {
	if mode == capture.TPROXY && user == capture.DefaultProxyID {
		return &FieldError{Field: "Interception.Mode", Value: string(mode), Err: fmt.Errorf("as user %d the agent's connections to"+
			" the workload would come back to itself; run it as user 0 and group %d, with the capability NET_ADMIN, as Istio's"+
			" injector does", user, capture.DefaultProxyID)}
	}
	return nil
}

// build makes the parts in the order in which they depend on each other. The sinks of records come before the listeners,
// because listeners open records.
func (a *Agent) build() error {
	poller, err := tcp.NewPoller()
	if err != nil {
		return err
	}
	a.poller = poller
	a.budget = budget.New(a.config.HTTP.heldBytes(debug.SetMemoryLimit(-1)))
	ctx, cancel := context.WithCancel(context.Background())
	a.stopAddresses = cancel
	addresses, err := localaddr.Watch(ctx, a.log)
	if err != nil {
		cancel()
		return err
	}
	a.addresses = addresses
	if err := a.tell(); err != nil {
		return err
	}
	if err := a.addControlPlane(); err != nil {
		return err
	}
	if err := a.addPolicy(); err != nil {
		return err
	}
	if err := a.addListeners(); err != nil {
		return err
	}
	if err := a.serve(); err != nil {
		return err
	}
	if err := a.bind(); err != nil {
		return err
	}
	if err := a.resolve(); err != nil {
		return err
	}
	a.telling.watch(a)
	return nil
}

// bind opens all ports but the resolver's.
func (a *Agent) bind() error {
	var err error
	for _, l := range slices.Backward(a.listeners) {
		if l.server.Dynamic {
			continue
		}
		if l.server.Listeners, err = a.bindListener(l); err != nil {
			return err
		}
	}
	for _, s := range a.servers {
		if s.listeners, err = listen(a, s.field, s.addresses, s.port, listenHTTP); err != nil {
			return err
		}
	}
	return nil
}

// Run serves until drain ends, and then shuts down: see shutdown.go. When force ends too, it cuts the remaining
// connections. It returns ErrForced when connections were cut, and nil otherwise or when the agent was ordered to quit
// at once.
func (a *Agent) Run(drain, force context.Context) error {
	defer a.close()
	for _, l := range slices.Backward(a.listeners) {
		l.server.Start()
	}
	if err := a.acceptFirst(); err != nil {
		return err
	}
	if a.resolver != nil {
		a.resolver.Start()
	}
	for _, s := range a.servers {
		a.start(s)
	}
	a.startControlPlane()
	a.startAccepting()
	a.unmapProgram()
	a.startTending()
	a.log.Info("carrying traffic", a.where()...)

	select {
	case <-drain.Done():
	case <-a.over.Done():
	}
	force, stop := context.WithCancel(force)
	defer stop()
	defer context.AfterFunc(a.over, stop)()
	err := a.shutdown(force)
	a.serverLoops.Wait()
	if a.over.Err() != nil {
		return nil
	}
	return err
}

// close releases what New opened. Parts that shutdown has closed already are not affected. Pools and the poller come last:
// connections still use them.
func (a *Agent) close() {
	for _, l := range a.listeners {
		l.server.Close()
	}
	for _, s := range a.servers {
		for _, ln := range s.listeners {
			ln.Close()
		}
	}
	if a.unfollow != nil {
		a.unfollow()
	}
	a.endOrders()
	_ = a.telling.close() // shutdown has logged its error
	if a.probers != nil {
		a.probers.Close()
	}
	if a.resolver != nil {
		_ = a.resolver.Shutdown(a.over) // over has ended, so queries that are left are cut
	}
	a.stopControlPlane()
	if a.stopPolicy != nil {
		a.stopPolicy()
	}
	if a.stopTending != nil {
		a.stopTending()
	}
	if a.addresses != nil {
		a.stopAddresses()
		a.addresses.Wait()
	}
	for _, l := range a.listeners {
		l.pool.Close()
	}
	if a.poller != nil {
		a.poller.Close()
	}
}
