package kubeapi

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// kubeconfig is the part of a kubeconfig that is used here.
type kubeconfig struct {
	CurrentContext string `yaml:"current-context"`
	Contexts       []struct {
		Name    string
		Context struct{ Cluster, User, Namespace string }
	}
	Clusters []struct {
		Name    string
		Cluster cluster
	}
	Users []struct {
		Name string
		User user
	}
}

type cluster struct {
	Server                   string
	CertificateAuthority     string `yaml:"certificate-authority"`
	CertificateAuthorityData string `yaml:"certificate-authority-data"`
	InsecureSkipTLSVerify    bool   `yaml:"insecure-skip-tls-verify"`
	TLSServerName            string `yaml:"tls-server-name"`
	ProxyURL                 string `yaml:"proxy-url"`
}

type user struct {
	ClientCertificate     string `yaml:"client-certificate"`
	ClientCertificateData string `yaml:"client-certificate-data"`
	ClientKey             string `yaml:"client-key"`
	ClientKeyData         string `yaml:"client-key-data"`
	Token                 string
	TokenFile             string `yaml:"tokenFile"`
	Username              string
	AuthProvider          *yaml.Node `yaml:"auth-provider"`
	Exec                  *plugin
}

// plugin is a program that prints credentials (client.authentication.k8s.io).
type plugin struct {
	APIVersion string `yaml:"apiVersion"`
	Command    string
	Args       []string
	Env        []struct{ Name, Value string }
}

const maxKubeconfig = 4 << 20

// Open reads a kubeconfig and returns a client for a context of it. An empty name of a file means $KUBECONFIG, else
// ~/.kube/config, else the service account of the pod. An empty context means the current one.
func Open(ctx context.Context, file, contextName string) (*Client, error) {
	files := filepath.SplitList(os.Getenv("KUBECONFIG"))
	if file != "" {
		files = []string{file}
	}
	if len(files) == 0 {
		home, err := os.UserHomeDir()
		if err == nil {
			files = []string{filepath.Join(home, ".kube", "config")}
		}
	}
	var config kubeconfig
	read := 0
	for _, name := range files {
		text, err := os.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) && file == "" {
			continue // as kubectl
		}
		if err == nil && len(text) > maxKubeconfig {
			err = fmt.Errorf("%s: longer than %d MiB", name, maxKubeconfig>>20)
		}
		if err != nil {
			return nil, fmt.Errorf("reading the kubeconfig: %w", err)
		}
		if err := config.merge(text, filepath.Dir(name)); err != nil {
			return nil, fmt.Errorf("reading the kubeconfig %s: %w", name, err)
		}
		read++
	}
	if read == 0 {
		if host := os.Getenv("KUBERNETES_SERVICE_HOST"); host != "" && contextName == "" {
			return inCluster(serviceAccount, host, os.Getenv("KUBERNETES_SERVICE_PORT"))
		}
		return nil, fmt.Errorf("there is no kubeconfig in %s: name one by --kubeconfig", strings.Join(files, ", "))
	}
	return config.client(ctx, contextName)
}

// merge adds a file. Of entries with one name, the first counts. Paths are relative to the file's directory.
func (k *kubeconfig) merge(text []byte, directory string) error {
	var more kubeconfig
	if err := yaml.Unmarshal(text, &more); err != nil {
		return err
	}
	absolute := func(path *string) {
		if *path != "" && !filepath.IsAbs(*path) {
			*path = filepath.Join(directory, *path)
		}
	}
	for i := range more.Clusters {
		absolute(&more.Clusters[i].Cluster.CertificateAuthority)
	}
	for i := range more.Users {
		u := &more.Users[i].User
		for _, path := range []*string{&u.ClientCertificate, &u.ClientKey, &u.TokenFile} {
			absolute(path)
		}
		if u.Exec != nil && strings.ContainsRune(u.Exec.Command, filepath.Separator) {
			absolute(&u.Exec.Command)
		}
	}
	if k.CurrentContext == "" {
		k.CurrentContext = more.CurrentContext
	}
	k.Contexts = append(k.Contexts, more.Contexts...)
	k.Clusters = append(k.Clusters, more.Clusters...)
	k.Users = append(k.Users, more.Users...)
	return nil
}

func (k *kubeconfig) client(ctx context.Context, name string) (*Client, error) {
	if name == "" {
		name = k.CurrentContext
	}
	if name == "" {
		return nil, errors.New("the kubeconfig has no current-context: choose one by --context")
	}
	for _, c := range k.Contexts {
		if c.Name != name {
			continue
		}
		client, err := k.connect(ctx, c.Context.Cluster, c.Context.User)
		if err != nil {
			return nil, fmt.Errorf("context %q: %w", name, err)
		}
		if c.Context.Namespace != "" {
			client.Namespace = c.Context.Namespace
		}
		return client, nil
	}
	return nil, fmt.Errorf("the kubeconfig has no context %q", name)
}

func (k *kubeconfig) connect(ctx context.Context, clusterName, userName string) (*Client, error) {
	var to *cluster
	for i := range k.Clusters {
		if to == nil && k.Clusters[i].Name == clusterName {
			to = &k.Clusters[i].Cluster
		}
	}
	if to == nil {
		return nil, fmt.Errorf("there is no cluster %q", clusterName)
	}
	var as user
	for i := range k.Users {
		if k.Users[i].Name == userName {
			as = k.Users[i].User
			break
		}
	}
	if as.AuthProvider != nil || as.Username != "" {
		return nil, fmt.Errorf("user %q: auth-provider and passwords are not supported: use a token, a client certificate or exec", userName)
	}
	roots, err := material(to.CertificateAuthorityData, to.CertificateAuthority)
	if err != nil {
		return nil, fmt.Errorf("certificate-authority: %w", err)
	}
	pair, token, err := as.credentials(ctx)
	if err != nil {
		return nil, fmt.Errorf("user %q: %w", userName, err)
	}
	return newClient(to.Server, to.TLSServerName, to.ProxyURL, roots, to.InsecureSkipTLSVerify, pair, token)
}

// material decodes data, or reads the file.
func material(data, file string) ([]byte, error) {
	if data != "" {
		return base64.StdEncoding.DecodeString(data)
	}
	if file != "" {
		return os.ReadFile(file)
	}
	return nil, nil
}

func (u user) credentials(ctx context.Context) (*tls.Certificate, string, error) {
	certificate, err := material(u.ClientCertificateData, u.ClientCertificate)
	if err != nil {
		return nil, "", fmt.Errorf("client-certificate: %w", err)
	}
	key, err := material(u.ClientKeyData, u.ClientKey)
	if err != nil {
		return nil, "", fmt.Errorf("client-key: %w", err)
	}
	token := u.Token
	if u.TokenFile != "" {
		text, err := os.ReadFile(u.TokenFile)
		if err != nil {
			return nil, "", fmt.Errorf("tokenFile: %w", err)
		}
		token = strings.TrimSpace(string(text))
	}
	if u.Exec != nil && token == "" && len(certificate) == 0 {
		if certificate, key, token, err = u.Exec.run(ctx); err != nil {
			return nil, "", err
		}
	}
	if len(certificate) == 0 {
		return nil, token, nil
	}
	pair, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		return nil, "", fmt.Errorf("client-certificate: %w", err)
	}
	return &pair, token, nil
}

const pluginTimeout = time.Minute // it may open a browser

func (p *plugin) run(ctx context.Context) (certificate, key []byte, token string, err error) {
	ctx, cancel := context.WithTimeout(ctx, pluginTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, p.Command, p.Args...)
	cmd.Env = append(os.Environ(), `KUBERNETES_EXEC_INFO={"apiVersion":"`+p.APIVersion+`","kind":"ExecCredential","spec":{"interactive":false}}`)
	for _, variable := range p.Env {
		cmd.Env = append(cmd.Env, variable.Name+"="+variable.Value)
	}
	var complaint bytes.Buffer
	cmd.Stderr = &complaint
	cmd.WaitDelay = time.Second // a child that outlives the plugin may hold its output open
	out, err := cmd.Output()
	if err != nil {
		return nil, nil, "", fmt.Errorf("exec %s: %w: %s", p.Command, err, strings.TrimSpace(complaint.String()))
	}
	var answer struct {
		Status struct{ Token, ClientCertificateData, ClientKeyData string }
	}
	if err := json.Unmarshal(out, &answer); err != nil {
		return nil, nil, "", fmt.Errorf("exec %s: reading its credentials: %w", p.Command, err)
	}
	s := answer.Status
	if s.Token == "" && s.ClientCertificateData == "" {
		return nil, nil, "", fmt.Errorf("exec %s: its answer has no credentials", p.Command)
	}
	return []byte(s.ClientCertificateData), []byte(s.ClientKeyData), s.Token, nil
}
